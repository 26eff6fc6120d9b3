from .choose_channels import Plan as Plan
from .choose_channels import plan as plan
from .costs import latency as latency
from .cut_channels import apply as apply
from .distillation import Distiller as Distiller
from .distillation import distill as distill
from .importance import importance as importance
