// Package repair proves on a real cluster with a real node (package rig) that
// remedies mend what probes find: the node loses its storage packages, and the
// agent, allowed to, brings them back through the fleet's gate, survives being
// killed half-way, and takes everything back in the end.
//
//	HYGIENE_NIGHTLY=1 go test -tags cluster -timeout 20m ./test/repair
//
// starts a cluster of its own. With HYGIENE_ATTACH=1 it uses the one of "go run
// ./test/cluster up" instead (CLUSTER names one of several), and leaves it as it
// was. The node fetches two packages from its Debian mirror when the test
// begins; from then on it knows no repository but its own folder.
package repair
