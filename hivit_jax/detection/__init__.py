"""Geometry of detection on fixed shapes: boxes, anchors, assignment, suppression, RoIAlign.

It knows neither models nor data, so that both models (proposals, heads) and tasks (targets, losses)
may use it. Boxes are (x1, y1, x2, y2) in pixels with width x2 - x1; cell i of a map of stride s
covers [s * i, s * (i + 1)]. All functions are for one image; `jax.vmap` makes a batch of them.
What varies in number stands in fixed slots with a mask.
"""
