"""Any 3D file to a coloured point cloud."""

from pointalign.data.files.cloud import PointCloud
from pointalign.data.files.load import load_point_cloud

__all__ = ["PointCloud", "load_point_cloud"]
