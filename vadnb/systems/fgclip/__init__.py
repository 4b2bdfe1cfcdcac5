"Video anomaly detection with region captions: CLIP, trained on what happens, where and when"
from .system import Config, FGCLIP
System = FGCLIP
