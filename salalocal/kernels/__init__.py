"""Operations on tensors: tensors in, tensors out, for the model; no modules, no config, no state classes."""
