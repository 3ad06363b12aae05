"""The published generator, written anew from its description: what AdaPtis is compared with."""

from published.generator import Answer, publish

__all__ = ["Answer", "publish"]
