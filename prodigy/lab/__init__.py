"""The experiment side of the package: data, runs, figures and the notebook runner."""
