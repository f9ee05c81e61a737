{{/* Name of the release's objects, at most 40 characters so that component suffixes still fit. */}}
{{- define "vqstack.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "vqstack.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "vqstack.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* The helpers below take (dict "root" $ "component" NAME). */}}

{{- define "vqstack.componentName" -}}
{{- printf "%s-%s" (include "vqstack.fullname" .root) .component -}}
{{- end -}}

{{- define "vqstack.selectorLabels" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "vqstack.labels" -}}
{{ include "vqstack.selectorLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{- define "vqstack.image" -}}
{{- $image := (index .root.Values .component).image -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $image.repository (default .root.Chart.AppVersion $image.tag) -}}
{{- end -}}
{{- end -}}

{{/* Longer than everything that happens between the deletion of a pod and the end of its process:
     the preStop sleep, the drain, and 10 seconds to close the listeners. */}}
{{- define "vqstack.terminationGraceSeconds" -}}
{{- $drain := (index .root.Values .component).drain -}}
{{- add (int $drain.preStopSeconds) (int $drain.graceSeconds) 10 -}}
{{- end -}}

{{- define "vqstack.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: {{ int .root.Values.securityIds.user }}
runAsGroup: {{ int .root.Values.securityIds.group }}
fsGroup: {{ int .root.Values.securityIds.group }}
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "vqstack.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop:
    - ALL
{{- end -}}

{{/* Numbers reach templates as floats; 24000000 must not become 2.4e+07. */}}
{{- define "vqstack.settingValue" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) -}}
{{- int64 . -}}
{{- else -}}
{{- . -}}
{{- end -}}
{{- end -}}

{{- define "vqstack.env" -}}
{{- $values := index .root.Values .component -}}
- name: VQSERVE_HOST
  value: "0.0.0.0"
- name: VQSERVE_GRPC_PORT
  value: {{ $values.ports.grpc | int | quote }}
- name: VQSERVE_HTTP_PORT
  value: {{ $values.ports.http | int | quote }}
- name: VQSERVE_DRAIN_GRACE_SECONDS
  value: {{ $values.drain.graceSeconds | int | quote }}
{{- range $key, $value := $values.settings }}
- name: VQSERVE_{{ upper $key }}
  value: {{ include "vqstack.settingValue" $value | quote }}
{{- end }}
{{- end -}}

{{- define "vqstack.probes" -}}
{{- $values := index .root.Values .component -}}
startupProbe:
  httpGet:
    path: /startupz
    port: http
  periodSeconds: 5
  timeoutSeconds: 3
  failureThreshold: {{ ceil (divf $values.startupSeconds 5) | int }}
readinessProbe:
  httpGet:
    path: /readyz
    port: http
  periodSeconds: 5
  timeoutSeconds: 3
  failureThreshold: 2
livenessProbe:
  # The event loop turns; says nothing about models or load, which a restart would not cure.
  httpGet:
    path: /livez
    port: http
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
lifecycle:
  preStop:
    sleep:
      seconds: {{ int $values.drain.preStopSeconds }}
{{- end -}}

{{- define "vqstack.scratchMounts" -}}
- name: tmp
  mountPath: /tmp
- name: cache
  mountPath: /cache
{{- end -}}

{{- define "vqstack.scratchVolumes" -}}
{{- $values := index .root.Values .component -}}
- name: tmp
  emptyDir:
    sizeLimit: {{ $values.tmpSize }}
- name: cache
  emptyDir:
    sizeLimit: {{ $values.cacheSize }}
{{- end -}}

{{/* What every pod of a component has before its containers. */}}
{{- define "vqstack.podMetadata" -}}
{{- $values := index .root.Values .component -}}
labels:
  {{- include "vqstack.labels" . | nindent 2 }}
{{- if or .root.Values.metricsAnnotations $values.podAnnotations }}
annotations:
  {{- if .root.Values.metricsAnnotations }}
  prometheus.io/scrape: "true"
  prometheus.io/port: {{ $values.ports.http | int | quote }}
  prometheus.io/path: /metrics
  {{- end }}
  {{- with $values.podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "vqstack.podSettings" -}}
{{- $values := index .root.Values .component -}}
serviceAccountName: {{ include "vqstack.serviceAccountName" .root }}
automountServiceAccountToken: false
# A Service called vqserve in the namespace would otherwise inject VQSERVE_* variables.
enableServiceLinks: false
terminationGracePeriodSeconds: {{ include "vqstack.terminationGraceSeconds" . }}
securityContext:
  {{- include "vqstack.podSecurityContext" . | nindent 2 }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* The container of a service, without env and volumeMounts of its own. */}}
{{- define "vqstack.containerCommon" -}}
{{- $values := index .root.Values .component -}}
image: {{ include "vqstack.image" . | quote }}
imagePullPolicy: {{ $values.image.pullPolicy }}
securityContext:
  {{- include "vqstack.containerSecurityContext" . | nindent 2 }}
resources:
  {{- toYaml $values.resources | nindent 2 }}
{{- end -}}

{{- define "vqstack.containerPorts" -}}
{{- $values := index .root.Values .component -}}
- name: grpc
  containerPort: {{ int $values.ports.grpc }}
- name: http
  containerPort: {{ int $values.ports.http }}
{{- end -}}

{{/* Two Services per component: one address for HTTP and simple clients, and a headless one so that
     gRPC clients see every pod (a gRPC connection stays on the pod it was opened to). */}}
{{- define "vqstack.services" -}}
{{- $values := index .root.Values .component -}}
{{- $name := include "vqstack.componentName" . -}}
apiVersion: v1
kind: Service
metadata:
  name: {{ $name }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "vqstack.labels" . | nindent 4 }}
spec:
  type: ClusterIP
  selector:
    {{- include "vqstack.selectorLabels" . | nindent 4 }}
  ports:
    {{- include "vqstack.servicePorts" $values | nindent 4 }}
---
apiVersion: v1
kind: Service
metadata:
  name: {{ $name }}-headless
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "vqstack.labels" . | nindent 4 }}
spec:
  type: ClusterIP
  clusterIP: None
  selector:
    {{- include "vqstack.selectorLabels" . | nindent 4 }}
  ports:
    {{- include "vqstack.servicePorts" $values | nindent 4 }}
{{- end -}}

{{- define "vqstack.servicePorts" -}}
- name: grpc
  port: {{ int .ports.grpc }}
  targetPort: grpc
  appProtocol: kubernetes.io/h2c
- name: http
  port: {{ int .ports.http }}
  targetPort: http
  appProtocol: http
{{- end -}}

{{- define "vqstack.podDisruptionBudget" -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ include "vqstack.componentName" . }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "vqstack.labels" . | nindent 4 }}
spec:
  maxUnavailable: {{ (index .root.Values .component).podDisruptionBudget.maxUnavailable }}
  selector:
    matchLabels:
      {{- include "vqstack.selectorLabels" . | nindent 6 }}
{{- end -}}
