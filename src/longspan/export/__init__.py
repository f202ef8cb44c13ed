"""Models with a method in them as folders that plain transformers and vLLM load."""

from longspan.export.checkpoint import export
from longspan.export.encoders import EncoderReport, export_encoder, longer_encoder
from longspan.export.folder import ExportReport

__all__ = ["EncoderReport", "ExportReport", "export", "export_encoder", "longer_encoder"]
