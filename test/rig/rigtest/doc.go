// Package rigtest is package rig in the hands of a test: a cluster with a node
// that ends with the test, and the words to ask both and to wait for what they
// come to say. What fails here fails the test, with the reason in its log.
//
//	c := rigtest.Start(t, rigtest.Options{Patience: time.Minute, Look: time.Second})
//	c.Kubectl(t, "apply", "-f", "../../manifests/")
//	c.PodReady(t, 0)
//	c.Guest(t, "systemctl stop chrony")
//	c.Await(t, "the daemon to be gone", func() error { … })
package rigtest
