"""Where the repository is: the one place that says so.

After a change, `python -m docs.generate` writes it into the first cell of every notebook, from
which Colab installs the package.
"""

REPOSITORY = ''  # such as https://github.com/OWNER/hivit_jax; '': it is not public yet
