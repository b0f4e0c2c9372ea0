// Command render prints what "kubectl kustomize DIR" would: the library is the
// one kubectl v1.36 has inside. It is a module of its own so that none of its
// dependencies reaches the product's.
//
//	go -C hack/render run . ../../manifests/kustomize/overlays/openshift
package main

import (
	"fmt"
	"os"

	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "render:", err)
		os.Exit(1)
	}
}

func run(dirs []string) error {
	if len(dirs) != 1 {
		return fmt.Errorf("want one kustomization folder, not %d", len(dirs))
	}
	opts := krusty.MakeDefaultOptions()
	opts.Reorder = krusty.ReorderOptionLegacy // kubectl's choice: what others need comes first
	resources, err := krusty.MakeKustomizer(opts).Run(filesys.MakeFsOnDisk(), dirs[0])
	if err != nil {
		return err
	}
	text, err := resources.AsYaml()
	if err != nil {
		return err
	}
	_, err = os.Stdout.Write(text)
	return err
}
