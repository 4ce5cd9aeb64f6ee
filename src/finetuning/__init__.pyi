# The functions are imported when they are first used; see __init__.py.
from finetuning.api import generate as generate
from finetuning.api import merge as merge
from finetuning.api import prepare as prepare
from finetuning.api import run as run

__version__: str
