"""LightningDataModules that hold their data in memory and give the same order for the same seed and epoch."""

from compress.data.arrays import ArrayDataModule, ImageSplit, ImageSplits
from compress.data.digits import Digits
from compress.data.fashion_mnist import FashionMNIST

__all__ = ["ArrayDataModule", "Digits", "FashionMNIST", "ImageSplit", "ImageSplits"]
