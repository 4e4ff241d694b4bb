"""What the scripts of tiered routing share.

Flow: data (raw text -> tokenised, split documents per domain) -> partition (domain or document ->
partition) -> router (prefix embedding, centroids) -> training (one model per partition, isolated)
-> modeling_tiered (router + partition models as one causal LM) -> unlearning (remove a domain,
measure against a retrained gold) -> report (tables, plots, one page).
"""
