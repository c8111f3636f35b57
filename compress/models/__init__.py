"""Networks by name: the few that no library ships, and those that another library's function makes."""

from compress.models.constructed import Constructed
from compress.models.small import BasicBlock, ConvNet1d, LSTMClassifier, ResNet

__all__ = ["BasicBlock", "Constructed", "ConvNet1d", "LSTMClassifier", "ResNet"]
