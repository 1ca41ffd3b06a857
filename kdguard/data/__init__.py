"""From a person's file to ids and labels."""

IGNORE = -100  # the label of a token that is not a target, as in torch and transformers
