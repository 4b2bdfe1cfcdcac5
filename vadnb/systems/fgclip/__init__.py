"Video anomaly detection with region captions: CLIP, trained on what happens, where and when"
from .config import Config
from .system import FGCLIP
System = FGCLIP
