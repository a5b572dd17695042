"""Export of trained models to ONNX, torch.export and TorchScript."""

from .model import Export, ExportOptions, export_model

__all__ = ["Export", "ExportOptions", "export_model"]
