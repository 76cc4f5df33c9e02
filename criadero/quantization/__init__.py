"""Models made small: rounding, GPTQ, mixed precision, and the stage ``quantize`` that measures and seals."""
