"""vmferry moves running virtual machines between Linux hosts, with proof that what arrived is what left."""
