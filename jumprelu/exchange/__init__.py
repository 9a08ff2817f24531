"""SAEs of others: Gemma Scope, and the files of SAELens, dictionary_learning, sparsify and others,
both ways."""
