from types import SimpleNamespace as N
def expected(rows, n): return [N(mean=sum(r.values())/len(r), low=0.0, high=1.0) for r in rows]
def paired(a,b): return N(n=len(a))
