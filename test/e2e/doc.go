// Package e2e proves the agent on a real cluster with a real node (package
// rig): the manifests are applied as they are delivered, faults are made on the
// node as they happen to hardware, and everything is judged by what the
// Kubernetes API shows.
//
//	go test -tags cluster -timeout 30m ./test/e2e
//
// starts a cluster of its own, which takes a minute or two. Environment:
//
//	HYGIENE_ATTACH=1     use the cluster of "go run ./test/cluster up" instead
//	                     (CLUSTER names one of several); what takes owning its
//	                     processes is left out
//	HYGIENE_NIGHTLY=1    also run what takes tens of minutes
//	HYGIENE_E2E_TABLE=F  write the table of latencies to the file F as well
//
// "make bench-node" measures, on a cluster of its own or an attached one, what
// docs/performance.md shows of a real node, and writes it there. Every run here
// makes each of those measurements in short, and asserts what does not depend
// on how fast the machine is: that a fault was told before the agent would have
// looked, that no command was executed, that nothing was written.
//
// "make chaos" does at length what may go wrong around the agent, and writes what
// came of it into docs/reliability.md; every run does some of it.
//
// "make soak" makes faults of all kinds at random for half an hour, several at a
// time, and judges by the log of them alone what was told; then it takes from the
// node what the agent itself needs. docs/reliability.md has what came of it. Every
// run soaks the node for 20 seconds.
//
// Single scenarios are selected as Go tests are:
//
//	HYGIENE_ATTACH=1 go test -tags cluster ./test/e2e -run 'TestAgent/scenarios/chronyd_stopped'
package e2e
