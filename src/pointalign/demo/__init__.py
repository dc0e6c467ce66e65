"""The web page: a 3D file dropped or an object picked, its cloud to turn, and a conversation about it."""

from pointalign.demo.serving import serve

__all__ = ["serve"]
