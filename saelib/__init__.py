"""saelib: the thin module under the book. Read `profile.py` first, then follow the data from left to right.

profile -> (model, text, hook, SAE) -> activations -> SAE -> metrics -> results -> book.
No module imports one to its right.
"""

import warnings

# transformers and TransformerLens look for notebook widgets on import; bars are plain text here, and the warning would
# stay in the notebook together with a path of the machine
warnings.filterwarnings("ignore", message="IProgress not found")

__version__ = "0.1.0"


class UserError(Exception):
    """Something the user gave is wrong: one line that names cause and cure. The CLI prints it and exits with 2."""
