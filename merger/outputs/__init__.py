"""Operations on a finished merge: verify, lock, push, extract and low-rank adapters."""
