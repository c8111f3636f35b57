"""A teacher's outputs on disk, by sample and augmented view: written once, read in every epoch."""

from compress.distill.cache.fields import Field
from compress.distill.cache.fingerprint import fingerprint_module, fingerprint_tensors
from compress.distill.cache.reader import OutputCache
from compress.distill.cache.writer import CacheWriter

__all__ = ["CacheWriter", "Field", "OutputCache", "fingerprint_module", "fingerprint_tensors"]
