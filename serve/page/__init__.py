"""Static files of the page at /; :mod:`quire.serve.routes.page` serves them."""
