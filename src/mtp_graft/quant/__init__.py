"""Number formats as documented encode/decode pairs: tensors in, tensors out.

Shape legend of this package: O outputs, I inputs, G groups along the inputs. Leading
dimensions (experts, say) pass through every function unchanged.
"""
