"""What a user adds from outside the package: a dense task with its model, data and evaluator."""
