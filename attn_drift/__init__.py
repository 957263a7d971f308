"""attn_drift: capture attention before and after a knowledge edit, and restrict the drifting heads (SADR).

The public names are listed in ``__init__.pyi``. Each is imported when it is first used: TransformerLens takes seconds,
and reading a file of cases does not need it.
"""

from importlib.metadata import version

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = version("attn-drift")
