"""Constraints on answers: from a schema, expression or grammar to a rule that is asked before every draw.

source.py       a constraint as text that llguidance reads, or a refusal that names what is wrong with it
vocabulary.py   a model's tokenizer as llguidance's
check.py        tries a grammar in a process of its own, check_process.py, which may hang or crash
rule.py         one answer's rule: masks out, drawn tokens in
compiler.py     all of these together, with a cache of what was compiled or refused
"""
