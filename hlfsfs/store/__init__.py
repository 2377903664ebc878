"""Where bytes live: stores behind one written contract."""
