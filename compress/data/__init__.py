"""LightningDataModules whose order and augmentation are functions of seed, epoch and sample."""

from compress.data.arrays import ArrayDataModule, ImageSplit, ImageSplits
from compress.data.cifar10 import CIFAR10
from compress.data.digits import Digits
from compress.data.fashion_mnist import FashionMNIST
from compress.data.keyed import KeyedDataset, KeyedSampler, keyed_loader, keyed_uniform
from compress.data.samples import SplitDataModule, TensorDataModule, TensorSplit, TensorSplits, tensor_datasets
from compress.data.sst2 import SST2
from compress.data.text import Tokenizer
from compress.data.ucr import UCR
from compress.data.wrapped import KeyedDataModule

__all__ = [
    "CIFAR10",
    "SST2",
    "UCR",
    "ArrayDataModule",
    "Digits",
    "FashionMNIST",
    "ImageSplit",
    "ImageSplits",
    "KeyedDataModule",
    "KeyedDataset",
    "KeyedSampler",
    "SplitDataModule",
    "TensorDataModule",
    "TensorSplit",
    "TensorSplits",
    "Tokenizer",
    "keyed_loader",
    "keyed_uniform",
    "tensor_datasets",
]
