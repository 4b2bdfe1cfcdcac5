"One model for the good images of all classes: what it cannot rebuild is a defect"
from .system import Config, UniADSystem
System = UniADSystem
