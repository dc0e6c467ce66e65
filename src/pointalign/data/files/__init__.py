"""Any 3D file to a coloured point cloud; and meshes as trimesh opens them, drawn from by area."""

from pointalign.data.files.cloud import PointCloud
from pointalign.data.files.load import load_point_cloud
from pointalign.data.files.meshes import mesh_parts, read_mesh, sample_mesh

__all__ = ["PointCloud", "load_point_cloud", "mesh_parts", "read_mesh", "sample_mesh"]
