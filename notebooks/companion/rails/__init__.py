"""What runs, keeps and shows: profiles, `make reproduce`, results kept by content, sweeps, figures,
the ledger of claims."""
