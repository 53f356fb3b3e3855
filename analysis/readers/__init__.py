"""Readers of the field's formats, one room for each family; `registry` knows which reads what."""
