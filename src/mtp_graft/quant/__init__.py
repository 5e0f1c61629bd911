"""INT4, FP8 blocks and MXFP4: tensors in, tensors out. INT4 alone is written; the others are read.

Shape legend of this package: O outputs, I inputs, G groups along the inputs. Leading
dimensions (experts, say) pass through every function unchanged.
"""
