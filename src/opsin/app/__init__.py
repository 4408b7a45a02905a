"""The web page. The room is also the verb `opsin.app()`."""

from opsin._verbs import make_callable

make_callable(__name__)
