"""Compiled CPU kernels: the whole step of a Llama-family decoder in one call.

`build` compiles the C++ beside this file for this processor, `library` binds it, `weights` packs a checkpoint for it,
`engine` is the engine on top.
"""
