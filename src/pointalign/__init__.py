"""PointAlign: 3D vision-language models whose point tokens keep their geometry."""

__version__ = "0.1.0"
