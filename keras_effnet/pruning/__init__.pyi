from .choose import Plan as Plan
from .choose import plan as plan
from .costs import latency as latency
from .cut import apply as apply
from .distillation import Distiller as Distiller
from .distillation import distill as distill
from .importance import importance as importance
