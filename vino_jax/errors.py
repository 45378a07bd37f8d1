"""The one exception that is the user's to mend."""


class UserError(Exception):
    """Bad input: one clear line that names the thing and says what to do.

    Entry points in `launch/` print it as that one line and exit with code 2; anything else is a bug and keeps its traceback.
    """
