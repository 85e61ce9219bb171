"""An int32 overflow, silent in Triton's interpreter and on a GPU, becomes an error: "int32 overflow detected".

Triton checks every signed sum, difference and product that is narrower than 64 bits in its debug mode, so an offset
that would not fit is found without a tensor of 2**31 elements. tl.device_assert works in that mode, too.
"""

from triton.runtime import interpreter


def install() -> None:
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True)
