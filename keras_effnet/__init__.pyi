from . import weights as weights
from .describe import describe as describe
from .describe import plot as plot
from .models import EfficientNetB0 as EfficientNetB0
from .models import EfficientNetB1 as EfficientNetB1
from .models import EfficientNetB2 as EfficientNetB2
from .models import EfficientNetB3 as EfficientNetB3
from .models import EfficientNetB4 as EfficientNetB4
from .models import EfficientNetB5 as EfficientNetB5
from .models import EfficientNetB6 as EfficientNetB6
from .models import EfficientNetB7 as EfficientNetB7
from .models import EfficientNetB8 as EfficientNetB8
from .models import EfficientNetEdgeTPUL as EfficientNetEdgeTPUL
from .models import EfficientNetEdgeTPUM as EfficientNetEdgeTPUM
from .models import EfficientNetEdgeTPUS as EfficientNetEdgeTPUS
from .models import EfficientNetL2 as EfficientNetL2
from .models import EfficientNetLite0 as EfficientNetLite0
from .models import EfficientNetLite1 as EfficientNetLite1
from .models import EfficientNetLite2 as EfficientNetLite2
from .models import EfficientNetLite3 as EfficientNetLite3
from .models import EfficientNetLite4 as EfficientNetLite4
from .models import create_model as create_model
from .models import features as features
from .preprocessing import decode_predictions as decode_predictions
from .preprocessing import load_image as load_image
from .variants import list_models as list_models

__version__: str
