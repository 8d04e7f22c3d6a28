"""What a token is, and what a document of preference data is: one byte each.

A token's byte in the cache holds its *kind* in 7 bits; the top bit says whether the token is trained. A document of preference
data has a *role*. Documents of SFT have none.
"""

TRAINED = 0x80  # top bit of a token's byte: this token is a target
KIND_MASK = 0x7F
TOKEN_KINDS = ("text", "special", "header", "system", "user", "tool", "answer", "reasoning", "tool_call", "terminator")
TEXT, SPECIAL, HEADER, SYSTEM, USER, TOOL, ANSWER, REASONING, TOOL_CALL, TERMINATOR = range(len(TOKEN_KINDS))

# Roles: an answer that is preferred, one that is not, and another row's answer to this prompt, by which KTO measures how far
# the policy has moved from its reference.
CHOSEN, REJECTED, MISMATCHED = range(3)
