"""Calls of functions and reasoning: what a model's markup means, in prompts and in answers.

markup        what one tokenizer's markers are
dialect       what one chat template expects of histories with calls, found out by trying
history       messages and functions as that template expects them
json_stream   one JSON value, checked while its text arrives
call_stream   {"name": ..., "arguments": {...}} while its text arrives
parse         any other syntax, through the model's own parser
bare          where calls without markers may begin
constraint    a grammar of calls, for answers that must be some
thinking      a token rule that ends reasoning, and lets another rule begin after it
"""
