package fleet

import (
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// CRD is what is read of a CustomResourceDefinition.
type CRD struct {
	Metadata metav1.ObjectMeta `json:"metadata"`
	Spec     struct {
		Group string `json:"group"`
		Names struct {
			Plural string `json:"plural"`
		} `json:"names"`
		Versions []struct {
			Name    string `json:"name"`
			Served  bool   `json:"served"`
			Storage bool   `json:"storage"`
		} `json:"versions"`
	} `json:"spec"`
	Status struct {
		StoredVersions []string `json:"storedVersions"`
	} `json:"status"`
}

// CheckStoredVersions: what custom resources are stored as is their storage
// version and no other. A version that is still among status.storedVersions can
// not be dropped from the CRD, so an operator's upgrade fails on it. Migration is
// the version of storagemigration.k8s.io that the API server serves, if any.
func CheckStoredVersions(crds []CRD, migration string) Check {
	c := Check{Name: "stored-versions"}
	for _, d := range crds {
		storage := ""
		served := map[string]bool{}
		for _, v := range d.Spec.Versions {
			if v.Storage {
				storage = v.Name
			}
			served[v.Name] = v.Served
		}
		var others, gone []string
		for _, v := range d.Status.StoredVersions {
			if v != storage {
				others = append(others, v)
			}
			if _, defined := served[v]; !defined {
				gone = append(gone, v)
			}
		}
		if len(others) == 0 {
			continue
		}
		what := fmt.Sprintf("objects may be stored as %s besides the storage version %s", strings.Join(others, ", "), storage)
		if len(gone) > 0 {
			what += fmt.Sprintf("; %s is no version of it any more, so such objects can not be read", strings.Join(gone, ", "))
		}
		resource := d.Spec.Names.Plural + "." + d.Spec.Group
		rewrite := []string{"kubectl get " + resource + " -A -o json | kubectl replace -f -   # writes every object as " + storage}
		if migration != "" {
			rewrite = []string{fmt.Sprintf("kubectl create -f - <<< '%s'   # then wait for its condition Succeeded", migrationOf(d, migration, storage))}
		}
		c.find(d.Metadata.Name, what, append(rewrite,
			fmt.Sprintf(`kubectl patch crd %s --subresource=status --type=merge -p '{"status":{"storedVersions":["%s"]}}'   # only when every object has been written again`, d.Metadata.Name, storage))...)
	}
	return c.done(fmt.Sprintf("%s, each stored in its storage version only", count(len(crds), "CustomResourceDefinition")))
}

func migrationOf(d CRD, api, storage string) string {
	resource := fmt.Sprintf(`"group":"%s","resource":"%s"`, d.Spec.Group, d.Spec.Names.Plural)
	if api == "v1alpha1" { // asks for a version, too
		resource += fmt.Sprintf(`,"version":"%s"`, storage)
	}
	return fmt.Sprintf(`{"apiVersion":"storagemigration.k8s.io/%s","kind":"StorageVersionMigration","metadata":{"name":"%s"},"spec":{"resource":{%s}}}`,
		api, d.Metadata.Name, resource)
}

// Migration is what is read of a StorageVersionMigration.
type Migration struct {
	Metadata metav1.ObjectMeta `json:"metadata"`
	Status   struct {
		Conditions []metav1.Condition `json:"conditions"`
	} `json:"status"`
}

// CheckMigrations: none runs, waits or has failed. Version is that of
// storagemigration.k8s.io, "" where it is not served.
func CheckMigrations(version string, list []Migration) Check {
	c := Check{Name: "migrations"}
	if version == "" {
		return c.done("storagemigration.k8s.io is not served here")
	}
	for _, m := range list {
		state := map[string]metav1.Condition{}
		for _, cond := range m.Status.Conditions {
			if cond.Status == metav1.ConditionTrue {
				state[cond.Type] = cond
			}
		}
		look := "kubectl get storageversionmigrations " + m.Metadata.Name + " -o yaml"
		_, succeeded := state["Succeeded"]
		failed, hasFailed := state["Failed"]
		_, running := state["Running"]
		switch {
		case hasFailed:
			c.find(m.Metadata.Name, "failed: "+failed.Message, look, "delete it and create it again when the cause is mended")
		case succeeded:
		case running:
			c.find(m.Metadata.Name, "is still running", look)
		default:
			c.find(m.Metadata.Name, "has not begun", look)
		}
	}
	return c.done(fmt.Sprintf("%s, none open", count(len(list), "StorageVersionMigration")))
}

// CheckNamespaces: none has been Terminating for longer than patience.
func CheckNamespaces(list []corev1.Namespace, patience time.Duration, now time.Time) Check {
	c := Check{Name: "namespaces"}
	for _, ns := range list {
		if ns.DeletionTimestamp == nil || now.Sub(ns.DeletionTimestamp.Time) < patience {
			continue
		}
		what := "has been Terminating for " + age(now, ns.DeletionTimestamp.Time)
		var why []string
		for _, cond := range ns.Status.Conditions {
			if cond.Status == corev1.ConditionTrue {
				why = append(why, cond.Message)
			}
		}
		slices.Sort(why)
		if len(why) > 0 {
			what += ": " + strings.Join(why, "; ")
		}
		c.find(ns.Name, what,
			"kubectl api-resources --verbs=list --namespaced -o name | xargs -n 1 kubectl get -n "+ns.Name+" --ignore-not-found --show-kind",
			"kubectl get apiservices | grep False   # an aggregated API that does not answer holds every namespace")
	}
	return c.done(fmt.Sprintf("%s, none stuck in Terminating", count(len(list), "namespace")))
}

// Dying is an object that is being deleted.
type Dying struct {
	// Resource is as kubectl takes it: "pods", "certificates.cert-manager.io".
	Resource, Namespace, Name string
	// Deleted is when it should have been gone: for a pod its grace is over then.
	Deleted    time.Time
	Finalizers []string
}

// CheckTerminating: nothing has been waiting to be deleted for longer than
// patience. Resources are what was looked through.
func CheckTerminating(list []Dying, resources []string, notChecked []string, patience time.Duration, now time.Time) Check {
	c := Check{Name: "terminating", NotChecked: notChecked}
	for _, d := range list {
		if now.Sub(d.Deleted) < patience {
			continue
		}
		name, in := d.Name, ""
		if d.Namespace != "" {
			name, in = d.Namespace+"/"+d.Name, " -n "+d.Namespace
		}
		what := "should have been gone for " + age(now, d.Deleted)
		run := []string{"kubectl describe " + d.Resource + in + " " + d.Name}
		switch {
		case len(d.Finalizers) > 0:
			what += "; waits for " + strings.Join(d.Finalizers, ", ")
			run = append(run, "mend or wait for the controller behind the finalizer; taking it off by hand leaves behind what it would have cleaned up")
		case d.Resource == "pods":
			what += "; the kubelet of its node has not ended it"
			run = append(run, "kubectl hygiene   # is the node silent?")
		}
		c.find(d.Resource+" "+name, what, run...)
	}
	return c.done(fmt.Sprintf("nothing stuck among %s", few(resources, 5)))
}
