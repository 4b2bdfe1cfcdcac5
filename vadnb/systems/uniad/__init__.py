"One model for the good images of all classes: what it cannot rebuild is a defect"
from .config import Config
from .system import UniADSystem
System = UniADSystem
