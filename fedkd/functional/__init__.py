"""Mathematics without files, configs or Flower: tensors in, tensors out."""
