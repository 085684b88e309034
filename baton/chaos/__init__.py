"""`baton chaos`: harm done to a cluster under load by a plan made from a seed, and the verdict on what came through.

    plan -> load, undisturbed -> load under harm -> aftermath -> verdict -> report

Plan, verdict and report are pure functions. A new kind of harm is one function in `harm.KINDS`.
"""
