"""What a user has done wrong."""


class UserError(Exception):
    """A mistake that the message alone explains: shown without a stack trace."""
