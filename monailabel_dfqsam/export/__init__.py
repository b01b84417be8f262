"""Models for devices without torch: the quantized encoder and the decoder as files of OpenVINO."""
